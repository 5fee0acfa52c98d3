"""The request router by experts: requests that want the same experts go to the same gang."""
