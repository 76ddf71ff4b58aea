"""Ground floor: divergences over rows of logits, and their chunked form over the model's head."""
