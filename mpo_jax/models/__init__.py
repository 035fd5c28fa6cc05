"""The decoder, its adapters, and Hugging Face weights both ways."""
