"""What Transformers says about masks, turned into documents."""
