"""Boards, alerts and configuration for Grafana and Prometheus; see README.md. No part of the server."""
