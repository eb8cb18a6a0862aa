"""What works on tasks: the agent, its hosts and slots, the Client API, and embedded executors."""
