"""A run's model out to other programs, in the layout of Hugging Face, and back."""
