"""What calls ask and answer: the shapes of requests, and of what comes back."""
