"""Is every byte, count and mask of a build as its manifest says?"""
