"""Reading other people's logs, a row at a time: CSV, JSON lines, TensorBoard, W&B, and our own run folders."""
