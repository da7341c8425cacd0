"""A model one block at a time: from its files, or from memory."""
