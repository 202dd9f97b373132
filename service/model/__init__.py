"""The model behind the service: its replica, how it is reached, how it is."""
