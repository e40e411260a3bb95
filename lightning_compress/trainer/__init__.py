"""Lightning glue that the techniques share: when things happen, never what happens."""
