"""Everything that makes the embedded demo model: drawn clips, captions, checker, training and export."""
