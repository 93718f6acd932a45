"""One turn, from the claim of its thread to its end; and what is kept between two."""
