"""The interface of methods, fleets and devices, and the messages between them."""
