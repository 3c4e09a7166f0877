"""Sound in and out: recordings to text, text to speech."""
