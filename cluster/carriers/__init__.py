"""Carriers move frames of bytes between nodes: direct sockets, Ray calls, or memory in tests."""
