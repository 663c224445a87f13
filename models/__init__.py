"""Networks and what they learn. torch only; runs and is tested without Ray."""
