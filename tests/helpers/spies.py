"""What a computation does on its way: the keys it hashes, the memory it takes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_attn.hashing import BucketHash
from hf_sparse_attn.ops.numba import index as numba_index


def count_hashed_keys(monkeypatch):
    """A list of how many keys are hashed each time, many at once or few."""
    hashed, many, few = [], BucketHash.assign, numba_index.hash_keys
    monkeypatch.setattr(BucketHash, "assign", lambda self, key: hashed.append(key.shape[1]) or many(self, key))
    monkeypatch.setattr(numba_index, "hash_keys", lambda key, *args: hashed.append(key.shape[1]) or few(key, *args))
    return hashed


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage, in bytes, that any operation returned; all in one thread, the only one it sees."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __enter__(self):
        self.num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_num_threads(self.num_threads)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result
