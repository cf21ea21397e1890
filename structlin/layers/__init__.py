"""The modules that take the place of dense ones, whatever their structure."""
