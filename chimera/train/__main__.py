"""`composer -m chimera.train CONFIG [key=value ...]`: train, or go on training."""

from chimera.commands.train import entry

if __name__ == "__main__":
    entry()
