"""What the dialects share: what a dialect is, and the machinery that reads operands, custom ops and quantisers."""
