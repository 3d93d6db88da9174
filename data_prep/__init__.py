"""Raw text to tokenizer, to shards, to an exactly ordered token stream. Knows no model and no DeepSpeed."""
