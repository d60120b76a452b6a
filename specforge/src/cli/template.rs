//! The chat template of a command that reads no configuration: the target's own, or one from a file.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value};

use crate::data::{ChatTokenizer, DataConfig};
use crate::error::{Error, Result};

#[derive(Debug, Clone, Args)]
pub(super) struct TemplateArgs {
    /// Jinja file to use instead of the target's own chat template; `data.chat_template` of a configuration. Answers,
    /// training and evaluation must go by the same one.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Values the chat template is given besides the conversation, as a JSON object such as '{"enable_thinking": false}';
    /// `data.template_arguments` of a configuration.
    #[arg(long, value_name = "JSON")]
    template_arguments: Option<String>,
}

impl TemplateArgs {
    /// Values the template is given besides the conversation.
    pub(super) fn arguments(&self) -> Result<Map<String, Value>> {
        let Some(text) = &self.template_arguments else { return Ok(Map::new()) };
        match serde_json::from_str(text) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(Error::Usage(format!("--template-arguments: expected a JSON object, got `{text}`"))),
            Err(error) => Err(Error::Usage(format!("--template-arguments: `{text}` is not JSON: {error}"))),
        }
    }

    /// Whether a template of its own is given.
    pub(super) fn names_a_file(&self) -> bool {
        self.chat_template.is_some()
    }

    /// Whether anything is given.
    pub(super) fn is_given(&self) -> bool {
        self.chat_template.is_some() || self.template_arguments.is_some()
    }

    /// The tokenizer of a model folder with this template.
    pub(super) fn tokenizer(&self, folder: &Path) -> Result<ChatTokenizer> {
        let arguments = self.arguments()?;
        Ok(ChatTokenizer::load(folder, self.chat_template.as_deref())?.with_template_arguments(arguments))
    }

    /// What is given here goes before what a configuration says.
    pub(super) fn apply(&self, data: &mut DataConfig) -> Result<()> {
        if let Some(path) = &self.chat_template {
            data.chat_template = Some(path.clone());
        }
        data.template_arguments.extend(self.arguments()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_goes_before_the_configuration() {
        let given = TemplateArgs {
            chat_template: Some(PathBuf::from("a.jinja")),
            template_arguments: Some(r#"{"a": 1}"#.to_owned()),
        };
        let mut data = DataConfig { chat_template: Some(PathBuf::from("b.jinja")), ..DataConfig::default() };
        data.template_arguments.insert("b".to_owned(), 2.into());
        given.apply(&mut data).unwrap();
        assert_eq!(data.chat_template.unwrap(), PathBuf::from("a.jinja"));
        assert_eq!(Value::Object(data.template_arguments), serde_json::json!({"b": 2, "a": 1}));
        for wrong in ["[1]", "{"] {
            let given = TemplateArgs { chat_template: None, template_arguments: Some(wrong.to_owned()) };
            assert!(given.arguments().unwrap_err().to_string().contains("--template-arguments"), "{wrong}");
        }
    }
}
