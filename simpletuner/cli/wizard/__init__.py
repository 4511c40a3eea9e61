"""`simpletuner configure`: what is proposed and why, apart from how it is asked."""
