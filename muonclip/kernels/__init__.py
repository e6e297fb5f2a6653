"""Custom kernels, each with a plain torch fallback that runs on any device."""
