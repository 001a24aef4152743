"""Memory that was freed goes back to the system, where glibc would keep it."""

import json
import subprocess
import sys

import pytest

from hf_sparse_attn.training import allocator

PROGRAM = """
import json, sys
exec(open(sys.argv[2]).read())
was_set = sys.argv[1] == "set" and return_freed_memory()
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
for _ in range(2):
    block = bytearray(30 * 2**20)  # freed, it raises glibc's threshold to its size
    del block
before = resident()
blocks = [bytearray(b"x" * 4 * 2**20) for _ in range(32)]
del blocks[::2]
print(json.dumps([was_set, resident() - before]))
"""


def resident_after(how, **environment):
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, allocator.__file__],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return json.loads(finished.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_blocks_between_those_in_use():
    was_set, size = resident_after("set")
    if not was_set:
        pytest.skip("the C library has no mallopt")
    in_use = 16 * 4 * 2**20
    assert in_use <= size + 2**20 < in_use + 8 * 2**20
    _, kept = resident_after("unset")
    assert kept > in_use + 32 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_the_users_own_setting_stays():
    assert not resident_after("set", MALLOC_MMAP_THRESHOLD_="33554432")[0]


def test_elsewhere_nothing_is_set(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.return_freed_memory()
