"""Where weights come from, in which layouts, and the parts that a model is made of."""

ENCODERS = ("vae", "text_encoder", "tokenizer")
PARTS = (*ENCODERS, "transformer")
