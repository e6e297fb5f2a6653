"""Optional integrations with other libraries; ``import muonclip`` loads none of them."""
