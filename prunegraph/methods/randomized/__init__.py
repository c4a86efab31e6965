"""Masks drawn at random and selected after a short training, and what they are measured against."""
