"""Other tools' control vectors to profiles and back, and profiles to and from a hub repository."""
