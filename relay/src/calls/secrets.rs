// SPDX-License-Identifier: PostgreSQL
//! Secrets by name: they stand in the environment or in a file, and neither in tables nor in logs.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::Uri;
use serde::Deserialize;

/// Where a secret stands.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretTable {
    env: Option<String>,
    file: Option<PathBuf>,
    /// Where it may be sent, as `https://host:port`. Without them a subscription may send it anywhere, a message nowhere: who
    /// may send messages is not for that trusted with secrets, and names the servers that are called.
    #[serde(default)]
    servers: Vec<String>,
}

/// A secret; it is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    text: String,
    /// Scheme, host and port.
    servers: Vec<String>,
}

impl Secret {
    /// What must not be shown.
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// Whether the configuration says where it may be sent.
    pub fn is_bound(&self) -> bool {
        !self.servers.is_empty()
    }

    /// Whether the configuration says that it may be sent there.
    pub fn is_for(&self, uri: &Uri) -> bool {
        server(uri).is_some_and(|server| self.servers.contains(&server))
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Secret { text, servers: Vec::new() }
    }
}

/// Scheme, host and port of an HTTP URI.
fn server(uri: &Uri) -> Option<String> {
    let scheme = uri.scheme_str()?;
    let port = match (uri.port_u16(), scheme) {
        (Some(port), _) => port,
        (None, "http") => 80,
        (None, "https") => 443,
        (None, _) => return None,
    };
    Some(format!("{scheme}://{}:{port}", uri.host()?.to_ascii_lowercase()))
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What must not be kept of an answer: a service can echo what it was sent.
#[derive(Clone, Debug, Default)]
pub struct Echoes {
    /// Longest first: a shorter one can be a part of it.
    parts: Vec<Secret>,
}

/// What is shorter is looked for only where it is a secret by itself: it stands in other words too.
const PART_CHARS_MIN: usize = 3;

/// So many letters and digits in a row of a secret are looked for by themselves: what stands between them may come back in
/// another form, such as `\/` for `/` in JSON, or `%2B` for `+`.
const RUN_CHARS_MIN: usize = 5;

/// The first word of credentials that many services take; it is no secret.
const SCHEMES: [&str; 14] = [
    "apikey",
    "api-key",
    "basic",
    "bearer",
    "digest",
    "dpop",
    "geniekey",
    "hawk",
    "hmac",
    "negotiate",
    "oauth",
    "splunk",
    "token",
    "vapid",
];

impl Echoes {
    /// Of secrets that are sent: each one and its words, for what stands around a word may be left out of the echo.
    pub fn of<'a>(secrets: impl IntoIterator<Item = &'a Secret>) -> Self {
        let mut parts = Vec::new();
        for secret in secrets {
            let is_scheme = |word: &str| SCHEMES.contains(&word.to_ascii_lowercase().as_str());
            let mut words: Vec<&str> = secret.reveal().split_whitespace().collect();
            if words.len() > 1 && is_scheme(words[0]) {
                words.remove(0);
            }
            let mut found: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            // User and password of Basic.
            let decoded = words.iter().filter_map(|word| BASE64.decode(word).ok());
            let decoded: Vec<String> = decoded.filter_map(|bytes| String::from_utf8(bytes).ok()).collect();
            found.extend(decoded.iter().flat_map(|text| text.split(':')).map(str::to_owned));
            for text in found.clone() {
                let runs = text.split(|c: char| !c.is_alphanumeric());
                found.extend(runs.filter(|run| run.chars().count() >= RUN_CHARS_MIN).map(str::to_owned));
            }
            let is_long = |part: &String| part.chars().count() >= PART_CHARS_MIN;
            parts.extend(found.into_iter().filter(is_long).map(Secret::from));
            parts.push(secret.clone());
        }
        parts.sort_by_key(|part| Reverse(part.text.len()));
        Echoes { parts }
    }

    /// Blanks them in a text, and at its end the beginning of one: the text may have been cut there.
    pub fn blank(&self, text: &mut String) {
        if text.is_empty() {
            return;
        }
        for Secret { text: part, .. } in &self.parts {
            if text.contains(part.as_str()) {
                *text = text.replace(part.as_str(), "…");
            }
        }
        // A character that was cut in the middle is no longer what it was.
        let end = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let begun = self.parts.iter().filter_map(|Secret { text: part, .. }| {
            let cuts = part.char_indices().map(|(at, _)| at).skip(PART_CHARS_MIN);
            cuts.filter(|at| end.ends_with(&part[..*at])).max()
        });
        if let Some(begun) = begun.max() {
            text.truncate(end.len() - begun);
            text.push('…');
        }
    }
}

/// All secrets that the configuration names.
pub type Secrets = BTreeMap<String, Secret>;

impl SecretTable {
    /// Reads the secret. The line break at a file's end is not a part of it. An error says what is wrong, without the secret.
    pub fn read(&self) -> Result<Secret, String> {
        let text = match (&self.env, &self.file) {
            (Some(name), None) => {
                std::env::var(name).map_err(|_| format!("the variable {name} is not set"))?
            }
            (None, Some(path)) => {
                let text =
                    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
                text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t)).unwrap_or(&text).to_owned()
            }
            _ => return Err("it needs either env or file".into()),
        };
        if text.is_empty() {
            return Err("it is empty".into());
        }
        let server = |text: &String| {
            let uri: Option<Uri> = text.parse().ok();
            let is_server = |uri: &Uri| uri.path() == "/" && uri.query().is_none();
            let named = uri.filter(is_server).as_ref().and_then(server);
            named.ok_or_else(|| format!("servers: {text:?} is not like https://host or https://host:port"))
        };
        let servers = self.servers.iter().map(server).collect::<Result<_, _>>()?;
        Ok(Secret { text, servers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(env: Option<&str>, file: Option<PathBuf>) -> Result<Secret, String> {
        SecretTable { env: env.map(str::to_owned), file, servers: Vec::new() }.read()
    }

    #[test]
    fn a_secret_comes_from_one_place_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "Bearer abc\n").unwrap();
        let secret = read(None, Some(path.clone())).unwrap();
        assert_eq!(secret.reveal(), "Bearer abc");
        assert!(!format!("{secret:?}").contains("abc"));
        assert!(read(Some("PATH"), None).is_ok());
        assert!(read(Some("DTM_NO_SUCH_VARIABLE"), None).unwrap_err().contains("DTM_NO_SUCH_VARIABLE"));
        assert!(read(None, None).is_err() && read(Some("PATH"), Some(path.clone())).is_err());
        std::fs::write(&path, "\n").unwrap();
        assert!(read(None, Some(path)).is_err());
    }

    #[test]
    fn a_secret_goes_where_the_configuration_says() {
        let read = |server: &str| {
            let servers = vec!["https://api.internal".into(), server.into()];
            SecretTable { env: Some("PATH".into()), file: None, servers }.read()
        };
        let secret = read("http://10.0.0.1:8080/").unwrap();
        for (uri, expected) in [
            ("https://api.internal/x?y", true),
            ("https://API.internal:443/", true),
            ("http://api.internal/", false),
            ("https://api.internal:8443/", false),
            ("https://api.internal.evil.example/", false),
            ("http://10.0.0.1:8080/x", true),
        ] {
            assert_eq!(secret.is_for(&uri.parse().unwrap()), expected, "{uri}");
        }
        for wrong in ["api.internal", "https://api.internal/path", "ftp://x", ""] {
            assert!(read(wrong).unwrap_err().starts_with("servers"), "{wrong}");
        }
    }

    fn blanked(secret: &str, text: &str) -> String {
        let mut text = text.to_owned();
        Echoes::of(&[Secret::from(secret.to_owned())]).blank(&mut text);
        text
    }

    #[test]
    fn a_secret_is_blanked_as_a_whole_and_word_by_word_but_its_scheme_is_none() {
        for (secret, text, kept) in [
            ("Bearer abc", "you sent Bearer abc or abc", "you sent … or …"),
            ("Basic eDp5", "no Basic but eDp5", "no Basic but …"),
            ("Token first second", "first, then second", "…, then …"),
            ("Bearer", "Bearer", "…"),
            ("first abcdef bc", "abcdef bc", "… bc"),
            ("k", "key k", "…ey …"),
            ("abc abcdef", "abcdef", "…"),
            ("Bearer abc", "nothing of it", "nothing of it"),
        ] {
            assert_eq!(blanked(secret, text), kept, "{secret} in {text}");
        }
    }

    #[test]
    fn the_beginning_of_a_secret_at_the_end_of_a_text_is_blanked() {
        for (secret, text, kept) in [
            ("Bearer 3f9a-key", "you sent 3f9a-k", "you sent …"),
            ("Bearer 3f9a-key", "you sent Bearer 3f9", "you sent …"),
            ("geheimnüsse", "geheimn\u{fffd}", "…"),
            ("Bearer 3f9a-key", "you sent 3f", "you sent 3f"),
            ("Bearer 3f9a-key", "3f9a and more", "3f9a and more"),
        ] {
            assert_eq!(blanked(secret, text), kept, "{secret} in {text}");
        }
    }

    #[test]
    fn a_secret_that_comes_back_in_another_form_is_blanked_too() {
        let echoes =
            ["Bearer a/b+Secret/zz", "Basic dXNlcjpodW50ZXIy"].map(|text| Secret::from(text.to_owned()));
        let echoes = Echoes::of(&echoes);
        for echo in [r"wrong: Bearer a\/b+Secret\/zz", "wrong: a%2Fb%2BSecret%2Fzz", "wrong password hunter2"]
        {
            let mut text = echo.to_owned();
            echoes.blank(&mut text);
            assert!(!text.contains("Secret") && !text.contains("hunter2"), "{text}");
        }
    }
}
