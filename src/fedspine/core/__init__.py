"""What a method sees, and the types that go between it, a fleet and a device."""
