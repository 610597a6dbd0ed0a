"""Class-wise texts: reading, checking, and choosing the images they are written from."""
