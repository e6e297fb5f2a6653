"""What is worth a kernel of its own; every one has a plain torch equivalent that runs anywhere."""
