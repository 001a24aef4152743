"""What Transformers says about masks, turned into documents; `read.read_documents` is the entry."""
