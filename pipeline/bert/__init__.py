"""The BERT model: configuration, packed encoder, heads, and weights in and out."""
