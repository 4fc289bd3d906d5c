//! `WWW-Authenticate` challenges (RFC 9110 section 11.3; the distribution project's token
//! specification).

/// A way to log in that a registry offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// Name and password.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// The token server's URL.
        realm: String,
        /// What to tell it of us.
        service: Option<String>,
        /// What to ask it for.
        scope: Option<String>,
    },
}

/// All challenges of one header that are known; the others are skipped.
pub(super) fn parse(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut rest = header;
    while let Some((scheme, parameters, after)) = one(rest) {
        let get = |name: &str| {
            let same = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
            parameters.iter().find(same).map(|(_, value)| value.clone())
        };
        if scheme.eq_ignore_ascii_case("basic") {
            found.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer")
            && let Some(realm) = get("realm")
        {
            found.push(Challenge::Bearer { realm, service: get("service"), scope: get("scope") });
        }
        rest = after;
    }
    found
}

type Parameters = Vec<(String, String)>;

/// The first challenge: scheme, parameters, and what follows it.
fn one(text: &str) -> Option<(&str, Parameters, &str)> {
    let text = text.trim_start_matches([' ', '\t', ',']);
    let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
    let (scheme, mut rest) = text.split_at_checked(end)?;
    if scheme.is_empty() {
        return None;
    }
    let mut parameters = Vec::new();
    loop {
        let next = rest.trim_start_matches([' ', '\t', ',']);
        let Some((key, value)) = next.split_once('=') else { break };
        // A word before the next `=` with a space in it begins another challenge.
        let key = key.trim_end();
        if key.is_empty() || key.contains([' ', '\t', ',', '"']) {
            break;
        }
        let (value, after) = quoted(value.trim_start());
        parameters.push((key.to_owned(), value));
        rest = after;
    }
    Some((scheme, parameters, rest.trim_start_matches([' ', '\t', ','])))
}

/// A quoted string or token, and what follows it.
fn quoted(text: &str) -> (String, &str) {
    let Some(inner) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        let (value, rest) = text.split_at_checked(end).unwrap_or((text, ""));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = inner.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, inner.get(at + 1..).unwrap_or_default()),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        let own = |text: Option<&str>| text.map(str::to_owned);
        Challenge::Bearer { realm: realm.into(), service: own(service), scope: own(scope) }
    }

    #[test]
    fn challenges_are_understood() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        assert_eq!(
            parse(hub),
            [bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:a/b:pull,push")
            )]
        );
        assert_eq!(parse("Basic realm=\"x\""), [Challenge::Basic]);
        assert_eq!(parse("basic"), [Challenge::Basic]);
        assert_eq!(
            parse(r#"Negotiate, Basic realm="a, b=\"c\"", bearer realm=u , service = "s""#),
            [Challenge::Basic, bearer("u", Some("s"), None)]
        );
        for none in ["", ",", "Bearer", "Bearer service=x", "Digest realm=x", "\"", "=", "a=\"b"] {
            assert_eq!(parse(none), [], "{none}");
        }
    }

    proptest! {
        #[test]
        fn hostile_21_any_challenge_ends(text in "[ ,=\"\\\\a-zB\t]{0,60}") {
            parse(&text);
        }
    }
}
