"""Thin bridges to other libraries, each optional and none imported by ``muonclip`` itself."""
