// Render a chat template of Ollama's as Ollama does: `go run render_ollama.go TEMPLATE`, with lines of JSON on
// stdin, {"system": …, "messages": […]}; a zero byte ends each prompt on stdout.
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type message struct {
	Role, Content string
	ToolCalls     []struct {
		Function struct {
			Name      string
			Arguments map[string]any
		}
	} `json:"tool_calls"`
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	text, err := os.ReadFile(os.Args[1])
	check(err)
	functions := template.FuncMap{"json": func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	}}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(string(text))
	check(err)
	for lines := json.NewDecoder(os.Stdin); lines.More(); {
		var chat struct {
			System   string
			Messages []*message
		}
		check(lines.Decode(&chat))
		values := map[string]any{"System": chat.System, "Messages": chat.Messages, "Response": ""}
		check(parsed.Execute(os.Stdout, values))
		os.Stdout.Write([]byte{0})
	}
}
