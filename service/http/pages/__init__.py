"""What is sent as it lies there: files, and answers that a client may have already."""
