"""What a simulation will take, before it is run: one client is measured, the rest is arithmetic."""
