//! What the environment says about the hub: the same variables with the same meaning as for Python's `huggingface_hub`.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};

/// The hub where none is named.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// How long a server may say nothing.
const DEFAULT_SILENCE: Duration = Duration::from_secs(10);

/// Where the hub is, where its files are kept, and who asks.
#[derive(Clone)]
pub struct Settings {
    /// `HF_ENDPOINT`, without a slash at its end.
    pub endpoint: String,
    /// `HF_HUB_CACHE`, else `$HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// `HF_TOKEN`, else what `hf auth login` left in `$HF_HOME/token`.
    pub token: Option<String>,
    /// `HF_HUB_OFFLINE`: nobody is asked.
    pub offline: bool,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`: how long a server may say nothing.
    pub silence: Duration,
}

// The token is nobody else's business.
impl std::fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Settings {{ endpoint: {:?}, cache: {:?} }}", self.endpoint, self.cache)
    }
}

impl Settings {
    /// Reads the environment of this process.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(|name| env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variable = &variable;
        let first = |names: &[&str]| names.iter().find_map(|name| variable(name));
        let is_true = |names: &[&str]| first(names).is_some_and(|value| is_true(&value));
        let user = variable("HOME").map(PathBuf::from);
        let expanded = |text: String| match (text.strip_prefix("~/"), &user) {
            (Some(rest), Some(user)) => user.join(rest),
            _ => PathBuf::from(text),
        };
        let home = variable("HF_HOME").map(expanded).or_else(|| {
            let caches = variable("XDG_CACHE_HOME").map(expanded).or_else(|| Some(user.as_ref()?.join(".cache")));
            Some(caches?.join("huggingface"))
        });
        let cache = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
            .map(expanded)
            .or_else(|| Some(home.as_ref()?.join("hub")))
            .ok_or_else(|| {
                Error::Usage("the hub's cache: set HF_HOME to a folder; there is no HOME either".to_owned())
            })?;
        // Links in it are relative, whoever looks at it from wherever.
        let cache = std::path::absolute(&cache).map_err(Error::io("look for", &cache))?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::Usage(format!("HF_ENDPOINT: expected https://... or http://..., got `{endpoint}`")));
        }
        let silence = match variable("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => DEFAULT_SILENCE,
            Some(text) => match text.trim().parse() {
                Ok(seconds @ 1..=86_400) => Duration::from_secs(seconds),
                _ => {
                    let problem = format!("expected seconds from 1 to 86400, got `{text}`");
                    return Err(Error::Usage(format!("HF_HUB_DOWNLOAD_TIMEOUT: {problem}")));
                }
            },
        };
        let of_login = || match is_true(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"]) {
            true => None,
            false => {
                variable("HF_TOKEN_PATH").map(expanded).or_else(|| Some(home?.join("token"))).and_then(saved_token)
            }
        };
        let token = first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).map(|token| token.trim().to_owned());
        let token = token.or_else(of_login);
        if token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(Error::Usage(
                "HF_TOKEN: expected a token, got something with blanks or odd letters".to_owned(),
            ));
        }
        let offline = is_true(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]);
        Ok(Self { endpoint, cache, token, offline, silence })
    }
}

/// As Python's client reads a switch.
fn is_true(value: &str) -> bool {
    matches!(value.trim().to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

fn saved_token(path: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn variables_mean_what_they_mean_elsewhere() {
        let settings = of(&[("HOME", "/home/x")]).unwrap();
        assert_eq!(settings.cache, Path::new("/home/x/.cache/huggingface/hub"));
        assert_eq!((settings.endpoint.as_str(), settings.offline), ("https://huggingface.co", false));
        let cache = |variables: &[(&str, &str)]| of(variables).unwrap().cache;
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]), Path::new("/c/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/c")]), Path::new("/h/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/cache")]), Path::new("/cache"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
        assert!(of(&[]).unwrap_err().to_string().contains("HF_HOME"));
        let home = ("HF_HOME", "/hf");
        for (value, offline) in [("1", true), ("true", true), ("on", true), ("0", false), ("no", false)] {
            assert_eq!(of(&[home, ("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }
        assert_eq!(of(&[home, ("HF_ENDPOINT", "http://x:1/")]).unwrap().endpoint, "http://x:1");
        assert!(of(&[home, ("HF_ENDPOINT", "x")]).unwrap_err().to_string().contains("HF_ENDPOINT"));
        assert!(of(&[home, ("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]).is_err());
    }

    #[test]
    fn the_token_is_given_or_saved_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        std::fs::write(folder.path().join("token"), "hf_saved\n").unwrap();
        let token = |more: &[(&str, &str)]| of(&[&[("HF_HOME", home)], more].concat()).unwrap().token;
        assert_eq!(token(&[]).as_deref(), Some("hf_saved"));
        assert_eq!(token(&[("HF_TOKEN", " hf_given\n")]).as_deref(), Some("hf_given"));
        assert_eq!(token(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        let secret = of(&[("HF_HOME", home), ("HF_TOKEN", "hf_secret")]).unwrap();
        assert!(!format!("{secret:?}").contains("secret"));
        let error = of(&[("HF_HOME", home), ("HF_TOKEN", "hf secret")]).unwrap_err().to_string();
        assert!(error.contains("HF_TOKEN") && !error.contains("secret"), "{error}");
    }
}
