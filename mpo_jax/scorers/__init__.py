"""Who judges replies: scorers by name, their identity, and how those outside the device are asked."""
