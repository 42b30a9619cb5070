"""What tests of drawings share."""

SVG = "{http://www.w3.org/2000/svg}"
