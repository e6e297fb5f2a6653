class QuantizedTensor:
    """No tensor is quantized."""
