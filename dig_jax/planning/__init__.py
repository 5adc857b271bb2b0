"""What programs cost on chips that need not be there: topologies, the chips' peaks, programs counted."""
