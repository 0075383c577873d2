"""What the commands do that join experiments or tools with reports."""
