"""Image features replace placeholder tokens."""

import pytest
import torch

from pretrain.model.multimodal import merge_features


def test_features_replace_placeholders_in_reading_order_and_take_gradients() -> None:
    embeddings = torch.zeros(3, 2, 1, requires_grad=True)
    placeholders = torch.tensor([[False, True, True], [True, False, False]])
    features = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    merged = merge_features(embeddings + 9, placeholders, features)
    assert merged[:, :, 0].T.tolist() == [[9, 1, 2], [3, 9, 9]]
    (merged * torch.arange(6.0).view(3, 2, 1)).sum().backward()
    assert features.grad is not None and embeddings.grad is not None
    assert features.grad[:, 0].tolist() == [2, 4, 1]
    assert embeddings.grad[:, :, 0].T.tolist() == [[0, 0, 0], [0, 3, 5]]


def test_too_few_or_too_many_features_are_rejected() -> None:
    with pytest.raises(ValueError, match="1 image placeholder tokens but 2 image features"):
        merge_features(torch.zeros(2, 1, 3), torch.tensor([[True, False]]), torch.zeros(2, 3))
