"""Tests; the tree mirrors the code, and golden/ holds numbers recorded from the official implementations."""
