//! Who may come in at all: `Host` and `Origin` (MCP, streamable HTTP, security: against DNS rebinding).

use http::{HeaderMap, Uri, header};

/// The names a browser may have used to get here.
#[derive(Clone, Debug)]
pub(super) struct Allowed {
    /// Host names, without port; `None` = any.
    pub(super) hosts: Option<Vec<String>>,
    /// Origins, `scheme://host[:port]`, beside those on an allowed host; `None` = any.
    pub(super) origins: Option<Vec<String>>,
}

impl Default for Allowed {
    /// Loopback.
    fn default() -> Self {
        let hosts = ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned);
        Allowed { hosts: Some(hosts.into()), origins: Some(Vec::new()) }
    }
}

impl Allowed {
    /// Why the request may not come in.
    pub(super) fn refusal(&self, headers: &HeaderMap, uri: &Uri) -> Option<&'static str> {
        if !self.host_is_allowed(headers, uri) {
            return Some("this Host is not served here");
        }
        if !headers.get_all(header::ORIGIN).iter().all(|origin| self.origin_is_allowed(origin.as_bytes())) {
            return Some("this Origin may not use this server");
        }
        None
    }

    fn host_is_allowed(&self, headers: &HeaderMap, uri: &Uri) -> bool {
        let Some(hosts) = &self.hosts else { return true };
        let mut given = headers.get_all(header::HOST).iter();
        let host = match (given.next(), given.next()) {
            (Some(host), None) => host.to_str().ok(),
            (None, _) => uri.authority().map(|authority| authority.as_str()),
            (Some(_), Some(_)) => None,
        };
        host.is_some_and(|host| is_one_of(hosts, host))
    }

    fn origin_is_allowed(&self, origin: &[u8]) -> bool {
        let Some(origins) = &self.origins else { return true };
        let Ok(origin) = std::str::from_utf8(origin) else { return false };
        if origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin)) {
            return true;
        }
        let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        match (host, &self.hosts) {
            (Some(host), Some(hosts)) => is_one_of(hosts, host),
            _ => false,
        }
    }
}

fn is_one_of(hosts: &[String], host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        // The colons of a bare IPv6 address are not a port's.
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !port.is_empty() => name,
        _ => host,
    };
    hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(pairs: &[(&'static str, &'static str)]) -> Option<&'static str> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        Allowed::default().refusal(&headers, &Uri::from_static("/mcp"))
    }

    #[test]
    fn loopback_comes_in_and_nothing_else() {
        for host in ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"] {
            assert_eq!(refusal(&[("host", host)]), None, "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "localhost:x"] {
            assert!(refusal(&[("host", host)]).is_some(), "{host}");
        }
        assert!(refusal(&[]).is_some());
        assert!(refusal(&[("host", "localhost"), ("host", "evil.example")]).is_some());
    }

    #[test]
    fn a_foreign_origin_stays_out() {
        let from = |origin| refusal(&[("host", "localhost"), ("origin", origin)]);
        assert_eq!(from("http://localhost:3000"), None);
        assert_eq!(from("https://127.0.0.1"), None);
        for origin in ["http://evil.example", "null", "http://localhost.evil.example", "file://localhost", ""]
        {
            assert!(from(origin).is_some(), "{origin}");
        }
    }
}
