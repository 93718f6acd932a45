"""What the API says of itself: the OpenAPI document, the page made of it, the list of problems."""
