"""The data sets as in-memory uint8 tensors, and the batches made from them."""
