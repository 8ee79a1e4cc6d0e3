"""Small models that see, and the pictures they are trained and tested on."""
